"""Digests, receipts, the ledger, and the questions that can be asked of them."""
