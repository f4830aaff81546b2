"""The problem of relations on a GPU: distances and angles in a batch."""
