package hostile

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/e2e/lab"
)

// What a test tells the process that it starts in a pod.
const (
	attackVariable    = "HOSTILE_ATTACK"
	machineVariable   = "HOSTILE_MACHINE"   // the network namespace that must not be the process's own
	bystanderVariable = "HOSTILE_BYSTANDER" // address of a server on the node that nobody attacks
)

// attackMain is the process in the pod. It ends after a minute at the latest.
func attackMain(kind string) int {
	here, err := os.Readlink("/proc/self/ns/net")
	if machine := os.Getenv(machineVariable); err != nil || machine == "" || here == machine {
		fmt.Fprintln(os.Stderr, "not in a network namespace of the lab:", err)
		return 1
	}
	if kind == "measure" {
		measure()
		return 0
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if _, err := Flood(ctx, kind); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// sample is one request of an innocent pod.
type sample struct {
	Bystander bool  // it was asked, not the endpoint
	At        int64 // Unix nanoseconds
	Took      time.Duration
	Err       string
}

// measure asks the endpoint for the role list, and the bystander after it, once a millisecond, and writes down how that went. It
// ends after a minute, or when nobody reads.
func measure() {
	out := json.NewEncoder(os.Stdout)
	servers := []*asked{{address: endpoint}, {address: os.Getenv(bystanderVariable), bystander: true}}
	tick := time.NewTicker(time.Millisecond)
	for end := time.Now().Add(time.Minute); time.Now().Before(end); {
		<-tick.C
		for _, s := range servers {
			if out.Encode(s.ask()) != nil {
				return
			}
		}
	}
}

// asked is a server as an innocent pod sees it.
type asked struct {
	address   string
	bystander bool
	kept      net.Conn
	n         int
}

// ask asks once, every second time on a new connection.
func (s *asked) ask() sample {
	start := time.Now()
	c, err := s.kept, error(nil)
	if c == nil || s.n%2 == 0 {
		c, err = net.DialTimeout("tcp", s.address, 2*time.Second)
	}
	s.n++
	if err == nil {
		_ = c.SetDeadline(time.Now().Add(2 * time.Second))
		err = exchange(c, get(list+"/"))
	}
	m := sample{Bystander: s.bystander, At: start.UnixNano(), Took: time.Since(start)}
	if err != nil {
		m.Err = err.Error()
		if c == s.kept {
			s.kept = nil
		}
	}
	if s.kept == nil && err == nil {
		s.kept = c
	} else if c != nil && c != s.kept {
		_ = c.Close()
	}
	return m
}

// inPod is the process of this test binary in the pod.
func inPod(ctx context.Context, t testing.TB, p *lab.Pod, kind string, nice int) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	machine, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	cmd := p.Command(ctx, "nice", "-n", strconv.Itoa(nice), self)
	cmd.Env = append(cmd.Env, attackVariable+"="+kind, machineVariable+"="+machine)
	return cmd
}

// start begins an attack, which stop ends.
func start(t testing.TB, p *lab.Pod, kind string) (cmd *exec.Cmd) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	cmd = inPod(ctx, t, p, kind, 19) // the weight of a BestEffort pod
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		cancel()
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		if err := cmd.Wait(); cmd.ProcessState.ExitCode() >= 0 && err != nil {
			t.Errorf("the attack ended by itself: %v %s", err, stderr.String())
		}
	})
	return cmd
}

// pause stops the attack or lets it go on.
func pause(t testing.TB, cmd *exec.Cmd, sig syscall.Signal) {
	t.Helper()
	if err := syscall.Kill(-cmd.Process.Pid, sig); err != nil {
		t.Fatal(err)
	}
}

// watch lets an innocent pod measure the endpoint and the bystander until stop is called, which returns the samples.
func watch(t testing.TB, p *lab.Pod, bystander string) (stop func() []sample) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	cmd := inPod(ctx, t, p, "measure", 0)
	cmd.Env = append(cmd.Env, bystanderVariable+"="+bystander)
	var out bytes.Buffer
	cmd.Stdout = &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return func() (samples []sample) {
		t.Helper()
		cancel()
		_ = cmd.Wait() // killed
		for line := range bytes.Lines(out.Bytes()) {
			var m sample
			if json.Unmarshal(line, &m) == nil { // the last one may be cut off
				samples = append(samples, m)
			}
		}
		return samples
	}
}
