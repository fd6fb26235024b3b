package clustertest_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/e2e/clustertest"
)

// A cluster whose state is on an overlay, as in most containers, runs pods too, and up leaves it as it is when it is up. Down
// finds what it must remove even when nobody remembers what there was.
func TestClusterLeavesNothing(t *testing.T) {
	ctx := t.Context()
	const name, dir = "imdsgate-left", "/var/tmp/imdsgate-left"
	down(t, name) // of an earlier run
	must(t, os.MkdirAll(dir, 0o700))
	layers := t.TempDir()
	for _, layer := range []string{"lower", "upper", "work"} {
		must(t, os.Mkdir(filepath.Join(layers, layer), 0o700))
	}
	must(t, syscall.Mount("overlay", dir, "overlay", 0, fmt.Sprintf("lowerdir=%[1]s/lower,upperdir=%[1]s/upper,workdir=%[1]s/work", layers)))
	t.Cleanup(func() {
		down(t, name)
		if err := errors.Join(syscall.Unmount(dir, 0), os.Remove(dir)); err != nil {
			t.Error(err)
		}
	})
	foreign := remains(t, name, nil)
	o := clustertest.Options{Name: name, Nodes: 1, Images: []string{"tools"}}
	c, err := clustertest.Up(ctx, o)
	must(t, err)
	must(t, c.Apply(ctx, strings.ReplaceAll(workload("default", "default", false), "aws:1", "tools:1")))
	_, err = c.Kubectl(ctx, "rollout", "status", "-n", "default", "daemonset/default", "--timeout=60s")
	must(t, err)
	before := remains(t, name, foreign)
	if len(before) < 15 {
		t.Fatalf("a cluster of no more than %q", before)
	}
	_, err = clustertest.Up(ctx, o)
	must(t, err)
	after := remains(t, name, foreign)
	for _, what := range before {
		if strings.Contains(what, "/bin/kube") && !slices.Contains(after, what) {
			t.Errorf("up ends what is up: %s", what)
		}
	}
	// Pid files and the list of cgroups.
	for _, pattern := range []string{"/*/*.pid", "/*/cgroups"} {
		files, err := filepath.Glob(dir + pattern)
		must(t, err)
		if len(files) == 0 {
			t.Fatalf("no %s%s", dir, pattern)
		}
		for _, file := range files {
			must(t, os.Remove(file))
		}
	}
	for range 2 {
		down(t, name)
		if left := remains(t, name, foreign); len(left) > 0 {
			t.Fatalf("still there: %q", left)
		}
	}
}

// Whoever is killed in the middle of up leaves nothing that down does not find.
func TestClusterUpInterrupted(t *testing.T) {
	const name, dir = "imdsgate-cut", "/var/tmp/imdsgate-cut"
	t.Cleanup(func() { down(t, name) })
	down(t, name) // of an earlier run
	foreign := remains(t, name, nil)
	for _, sign := range []string{"cp/pki/ca.crt", "cp/etcd.pid", "kubeconfig", "node1/cgroups", "node1/started"} {
		cmd := exec.CommandContext(t.Context(), "../cluster/cluster.sh", "up", "1")
		cmd.Env = append(os.Environ(), "CLUSTER="+name)
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		must(t, cmd.Start())
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		tick := time.NewTicker(time.Millisecond)
		for _, err := os.Stat(filepath.Join(dir, sign)); err != nil; _, err = os.Stat(filepath.Join(dir, sign)) {
			select {
			case err := <-ended:
				t.Fatalf("up ended before there was %s: %v", sign, err)
			case <-tick.C:
			}
		}
		tick.Stop()
		must(t, syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL))
		<-ended
		if len(remains(t, name, foreign)) == 0 {
			t.Errorf("killed at %s, up leaves nothing: nothing is tested", sign)
		}
		down(t, name)
		if left := remains(t, name, foreign); len(left) > 0 {
			t.Errorf("killed at %s, still there: %q", sign, left)
		}
	}
}

func down(t *testing.T, name string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "../cluster/cluster.sh", "down")
	cmd.Env = append(os.Environ(), "CLUSTER="+name)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("down: %v\n%s", err, out)
	}
}

// remains are the processes, network namespaces, mounts, cgroups and files of the cluster of this name but those that are foreign:
// the processes of one of the same name in another container of this machine, which are seen here as well.
func remains(t *testing.T, name string, foreign []string) []string {
	t.Helper()
	var found []string
	add := func(pattern string) {
		files, err := filepath.Glob(pattern)
		must(t, err)
		found = append(found, files...)
	}
	add("/run/netns/" + name + "-*")
	add("/var/tmp/" + name + "/*")
	mounts, err := os.ReadFile("/proc/self/mounts")
	must(t, err)
	for line := range strings.Lines(string(mounts)) {
		if point := strings.Fields(line)[1]; strings.HasPrefix(point, "/var/tmp/"+name+"/") {
			found = append(found, point)
		}
	}
	out, err := exec.CommandContext(t.Context(), "find", "/sys/fs/cgroup", "-type", "d", "-name", name+"-node*").Output()
	must(t, err)
	found = append(found, strings.Fields(string(out))...)
	pids, err := filepath.Glob("/proc/[0-9]*")
	must(t, err)
	for _, pid := range pids {
		command, _ := os.ReadFile(pid + "/cmdline")
		cgroup, _ := os.ReadFile(pid + "/cgroup")
		// A zombie has no command.
		if len(command) > 0 && (strings.Contains(string(command), "/var/tmp/"+name) || strings.Contains(string(cgroup), "/"+name+"-node")) {
			found = append(found, pid+" "+strings.ReplaceAll(string(command), "\x00", " "))
		}
	}
	slices.Sort(found)
	return slices.DeleteFunc(found, func(s string) bool { return slices.Contains(foreign, s) })
}
