"""Online algorithms, one readable file each: they make the experts whose episodes become data sets."""
