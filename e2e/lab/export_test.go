package lab

import "os"

// RunInMachineNamespace tries Do with the machine's own namespace.
func RunInMachineNamespace(fn func() error) error {
	f, err := os.Open("/proc/self/ns/net")
	if err != nil {
		return err
	}
	defer f.Close()
	return (&Namespace{Name: "machine", file: f}).Do(fn)
}
