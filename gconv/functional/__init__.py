"""Group convolution as functions of tensors: filter expansion, separable forms, group mixing."""
