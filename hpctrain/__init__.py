"""Training of convolutional networks on large images and volumes, partitioned over MPI ranks."""
