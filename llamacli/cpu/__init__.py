"""The CPU device: weights bound to addresses, the KV cache, experts in memory, and the compiled programs that use them."""
