"""The run folder and what happens to a run: its files, whole checkpoints, exact resume, signals, alarms, memory.

Nothing here knows of the method; modules take the trainer as a Transformers trainer.
"""
