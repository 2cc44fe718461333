"""Tools that the model may call: their definitions, the programs that run them, and the loop of calls and answers."""
