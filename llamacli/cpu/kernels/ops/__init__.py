"""Operations of the forward pass: matrix products, attention, norms, routing; and scanning of string lists."""
