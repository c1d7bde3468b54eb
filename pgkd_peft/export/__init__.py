"""From a trained adapter to what others can use: merged and verified, cleaned for publication, or GGUF.

``adapter`` finds what belongs to it, ``merged_weights`` adds it in float32, ``verify`` measures that the result is what
was trained. A new export format is a module here and an entry in ``publish.FORMATS``.
"""
