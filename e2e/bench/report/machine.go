package report

import (
	"bufio"
	"cmp"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// Machine is where a measurement was made, and of what.
type Machine struct {
	CPU    string `json:"cpu"`
	Cores  int    `json:"cores"`
	Memory string `json:"memory"`
	Kernel string `json:"kernel"`
	Go     string `json:"go"`
	Commit string `json:"commit"` // of this checkout; with "+" when something in it was changed since
}

func (m Machine) String() string {
	return fmt.Sprintf("%s, %d cores, %s, Linux %s, %s, commit %s", m.CPU, m.Cores, m.Memory, m.Kernel, m.Go, m.Commit)
}

func thisMachine() (Machine, error) {
	cpu, err := field("/proc/cpuinfo", "model name")
	if err != nil {
		return Machine{}, err
	}
	var info unix.Sysinfo_t
	var name unix.Utsname
	if err := unix.Sysinfo(&info); err != nil {
		return Machine{}, fmt.Errorf("sysinfo: %w", err)
	}
	if err := unix.Uname(&name); err != nil {
		return Machine{}, fmt.Errorf("uname: %w", err)
	}
	_, file, _, _ := runtime.Caller(0)
	git := exec.Command("git", "describe", "--always", "--dirty=+", "--exclude=*")
	git.Dir = filepath.Dir(file)
	commit, err := git.Output()
	if err != nil {
		commit = []byte("unknown") // an archive of the sources
	}
	return Machine{
		CPU: cmp.Or(cpu, "unknown processor"), Cores: runtime.NumCPU(),
		Memory: fmt.Sprintf("%.0f GiB", float64(info.Totalram)*float64(info.Unit)/(1<<30)),
		Kernel: unix.ByteSliceToString(name.Release[:]), Go: runtime.Version(), Commit: strings.TrimSpace(string(commit)),
	}, nil
}

// field is the first value of a name in a file of "name : value" lines; empty when there is none.
func field(file, name string) (string, error) {
	f, err := os.Open(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if key, value, ok := strings.Cut(lines.Text(), ":"); ok && strings.TrimSpace(key) == name {
			return strings.TrimSpace(value), nil
		}
	}
	return "", lines.Err()
}
