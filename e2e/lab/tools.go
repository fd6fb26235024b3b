package lab

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
)

// packages says which Debian package each program of the lab comes from.
var packages = map[string]string{
	"nsenter": "util-linux", "unshare": "util-linux", "mount": "util-linux", "setpriv": "util-linux",
	"ip": "iproute2", "iptables": "iptables", "iptables-save": "iptables", "conntrack": "conntrack", "xargs": "findutils",
}

// check tells what the machine lacks.
func check() error {
	if os.Geteuid() != 0 {
		return errors.New("the lab makes network namespaces and needs root")
	}
	var missing []string
	for program, pkg := range packages {
		if _, err := exec.LookPath(program); err != nil && !slices.Contains(missing, pkg) {
			missing = append(missing, pkg)
		}
	}
	if len(missing) > 0 {
		slices.Sort(missing)
		return fmt.Errorf("the lab needs programs that are not installed: apt-get install -y --no-install-recommends %s", strings.Join(missing, " "))
	}
	return nil
}
