"""What a user sets: the "interlocking" block, and the DeepSpeed configuration around it."""
