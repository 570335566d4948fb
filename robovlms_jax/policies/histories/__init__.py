"""Where observed steps meet, in training and in control: one object per history, see `base.History`."""
