"""What jobs keep: files on a disk or in a bucket, the folders of their results, rankings and questions about them."""
