"""One base (quantized, guarded), one LoRA, the head; other adapters beside it; and the proof that the base is frozen.

What is special about an architecture or a device stands here (``student``, ``head``, ``cpu``), never in the method.
"""
