"""What happened: the ledger of counts, events and captures."""
