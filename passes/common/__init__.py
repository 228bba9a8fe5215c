"""What all passes work with: markers, layouts, arguments, operator tables, the report and the finished program."""
