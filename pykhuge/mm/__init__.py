"""What khugepaged works on: struct pages, page tables, faults, rmap, LRU, swap, the allocator."""
