"""Tools that the model may call: what they are, where they run, and the loop of calls and answers."""
