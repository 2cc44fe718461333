"""Layers on several machines: Ray starts and watches the nodes; the residual stream goes through this project's own sockets."""
