"""The server: OpenAI's and Anthropic's protocols over one model (the extra `serve`; imported only by `llamacli serve`)."""
