"""What finds labels before training: features, k-means, TEMI and its upper bound, LOST boxes, STEGO masks."""
