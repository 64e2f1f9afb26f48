"""Filter banks: the group-convolution filters of any network or file."""
