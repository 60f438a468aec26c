"""What a user looks at: patches, traces, edits and tokens in a notebook; banks and reports as one page."""
