"""From a file, folder, Hub or package to checked rows and token ids: read, name, map, parse, place the PI, collate.

A new file format goes into ``files``, a new named set into ``named``, a new placement into ``contexts``. Nothing here
knows of models; ``row``, ``columns`` and ``contexts`` are text only, without torch.
"""
