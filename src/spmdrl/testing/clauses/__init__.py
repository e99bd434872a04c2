"""The clauses of the contract of train backends."""
