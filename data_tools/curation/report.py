"""report
stub
"""
def render(numbers, totals): return "<html></html>"
