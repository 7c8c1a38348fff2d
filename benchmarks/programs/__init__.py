"""Do other programs open what forge makes? Their own loading code beside ours, on full-size files of random numbers."""
