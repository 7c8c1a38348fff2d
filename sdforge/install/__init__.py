"""`forge install`: a preset's files where another program looks for them, and away again without a trace."""
