"""Files that anybody may have written, read without believing them: what `spec/hostile.md` promises is held here.

opening     a file that is a file: no folder, and no pipe or device that would hold us up
documents   JSON that is bounded in size, in values and in depth, and says nothing twice
header      the header of a safetensors file, every claim of it checked against the file
"""
