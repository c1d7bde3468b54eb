"""From a text alone to rows: a document or a system prompt -> passages -> questions -> what is worth training on.

``read`` takes the user's files, ``split`` makes passages, ``ask`` writes questions and anchors, ``keep`` answers them
and leaves out what teaches nothing, ``questions`` is the file that a user reads and edits, ``coverage`` says afterwards
how much of each passage was taken over. Nothing here trains; the command ``pgkd bake`` puts it together.
"""
