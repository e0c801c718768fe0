"""The work behind `infer-patch calibrate`: one file per method. Each loads nothing and prints nothing."""
