"""Layers on several machines: Ray places and watches the nodes, hidden states go over sockets of ours."""
