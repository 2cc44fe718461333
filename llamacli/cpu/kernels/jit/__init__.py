"""From Python to machine code: vector IR, the choice of CPU variant, compiling, the object cache."""
