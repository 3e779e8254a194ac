"""Where a text model meets images: one module per way of combining them."""
