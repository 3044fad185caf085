"""Prior × route × seed, and declared grids: cells, folders, tables, reports and pictures."""
