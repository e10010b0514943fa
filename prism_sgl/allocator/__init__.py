"""One device's memory: arenas that map and unmap pages, and the ledger in which owners share the budget."""
