"""What there is to see before, during and after a run: inspect, live views, tables, the report page.

Everything here may be changed without changing a number; nothing here measures.
"""
