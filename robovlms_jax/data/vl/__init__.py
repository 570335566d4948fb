"""Pictures with text about them (LLaVA, WebDataset, COCO), as batches beside a robot's."""
