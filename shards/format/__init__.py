"""What a data set is: manifest, header, tar layout, the order of samples, exact moments."""
