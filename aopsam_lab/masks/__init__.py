"""Masks: RLE, resizing, drawing, points inside one."""
