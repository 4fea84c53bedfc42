"""The agent: scans address spaces for blocks of 512 small pages and collapses them into huge ones.

`scan` decides, `anon` collapses anonymous memory, `file` the page cache, `retract` takes the page
tables away that still map a file's small pages; `madvise` is the same on demand (MADV_COLLAPSE).
"""
