"""The protocol: pure, without I/O, clock or threads, standard library only."""
