"""A client of servers: a model that another process has loaded, by OpenAI's protocol."""
