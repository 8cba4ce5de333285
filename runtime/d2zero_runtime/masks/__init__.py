"""From raw outputs to instances: selection, upsampling, and the forms of masks."""
