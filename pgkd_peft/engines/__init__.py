"""What writes the student's rollouts beside the PEFT model itself, and the choice between them.

An engine gives a context manager whose model :func:`pgkd_peft.rollout.generate` calls; a new one is a module here.
"""
