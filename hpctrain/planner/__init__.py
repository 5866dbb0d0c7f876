"""Plans: which partition each layer runs on. Nothing here starts MPI."""
