"""The agent: scans address spaces for blocks of 512 small pages and collapses them into huge ones.

`scan` decides, `anon` collapses anonymous memory, `madvise` is the same on demand (MADV_COLLAPSE).
"""
