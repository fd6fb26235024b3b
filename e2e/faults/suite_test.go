package faults

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/imdsgate/imdsgate/e2e/aws"
	"github.com/imdsgate/imdsgate/e2e/cluster/control"
	"github.com/imdsgate/imdsgate/e2e/clustertest"
)

const (
	clusterName = "imdsgate-faults"
	namespace   = "faults"
	// Of each pod: ten sequences a second, every one on connections of its own.
	workers  = 2
	interval = 200 * time.Millisecond
)

// suite is what all tests share.
type suite struct {
	*clustertest.Cluster
	loads  []*clustertest.Steady
	long   bool
	report report
}

var shared *suite

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) (code int) {
	start := time.Now()
	say := func(format string, args ...any) {
		fmt.Fprintf(os.Stderr, "[%5.1f s] %s\n", time.Since(start).Seconds(), fmt.Sprintf(format, args...))
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	s, err := begin(ctx, say)
	if s != nil && s.Cluster != nil {
		defer func() {
			var err error
			if os.Getenv("FAULTS_KEEP") == "" {
				err = s.Down(context.Background())
			} else { // for the next run, while one is at work on a single fault
				_, err = s.Kubectl(context.Background(), "delete", "namespace", namespace, "--ignore-not-found", "--timeout=60s")
			}
			if err != nil {
				say("clean up: %v", err)
				code = 1
			}
		}()
	}
	if err != nil {
		say("%v", err)
		return 1
	}
	shared = s
	code = m.Run()
	if err := s.report.write(); err != nil {
		say("%v", err)
		return 1
	}
	for _, e := range catalogue {
		if !s.report.ran[e.name] && e.long && !s.long {
			say("left to make test-faults: %s (%s)", e.name, e.how)
		}
	}
	return code
}

func begin(ctx context.Context, say func(string, ...any)) (_ *suite, err error) {
	s := &suite{long: os.Getenv("FAULTS") == "long"}
	if s.report, err = newReport(s.long); err != nil {
		return nil, err
	}
	images := []string{"pause"}
	say("starting node 1: bridge CNI, kube-proxy in iptables mode")
	if s.Cluster, err = clustertest.Up(ctx, clustertest.Options{Name: clusterName, Nodes: 1, Images: images}); err != nil {
		return s, err
	}
	say("starting node 2: ptp CNI, kube-proxy in nftables mode")
	if err := s.Node(2).Up(ctx, clustertest.Options{CNI: "ptp", ProxyMode: "nftables", Images: images}); err != nil {
		return s, err
	}
	say("building and installing imdsgate")
	if err := s.BuildDaemon(ctx); err != nil {
		return s, err
	}
	if err := s.LoadProbe(ctx); err != nil {
		return s, err
	}
	if err := s.Install(ctx); err != nil {
		return s, err
	}
	if _, err := s.Kubectl(ctx, "delete", "namespace", namespace, "--ignore-not-found", "--timeout=60s"); err != nil {
		return s, err
	}
	// Every role of the namespace: which of them a service account has is its annotation's to say.
	if err := s.Namespace(ctx, namespace, map[string]string{"iam.amazonaws.com/allowed-roles": `["arn:aws:iam::` + control.Account + `:role/faults/*"]`}); err != nil {
		return s, err
	}
	for node := 1; node <= 2; node++ {
		for _, colour := range []string{"red", "green"} { // two roles a node: one pod's credentials must not become the other's
			load, err := s.load(ctx, fmt.Sprintf("%s%d", colour, node), node)
			if err != nil {
				return s, err
			}
			s.loads = append(s.loads, load)
		}
	}
	say("the cluster is up, and the load is on")
	return s, nil
}

// load makes a pod with a role of its own that asks all the time.
func (s *suite) load(ctx context.Context, name string, node int) (*clustertest.Steady, error) {
	role, err := s.Fabric.Role(ctx, "faults/"+name, aws.ActionListBuckets)
	if err != nil {
		return nil, err
	}
	if err := s.ServiceAccount(ctx, namespace, name, map[string]string{"eks.amazonaws.com/role-arn": role}); err != nil {
		return nil, err
	}
	return s.StartSteady(ctx, clustertest.SteadyPod{
		Namespace: namespace, Name: name, ServiceAccount: name, Role: role, Node: node, Workers: workers, Interval: interval,
	})
}

// reinstall brings the release to the chart's defaults and these arguments of helm.
func (s *suite) reinstall(t *testing.T, args ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 2*time.Minute)
	defer cancel()
	if err := s.Install(ctx, args...); err != nil {
		t.Fatal(err)
	}
}

// mount is a directory or a file of the node in the daemon's container.
type mount struct{ name, node, kind, path string }

// values is a file of values with these mounts beside those of every cluster here.
func (f *fault) values(mounts ...mount) string {
	f.Helper()
	type object = map[string]any
	volumes := []object{{"name": "aws-ca", "configMap": object{"name": "aws-ca"}}}
	inside := []object{{"name": "aws-ca", "mountPath": "/etc/aws-ca", "readOnly": true}}
	for _, m := range mounts {
		volumes = append(volumes, object{"name": m.name, "hostPath": object{"path": m.node, "type": m.kind}})
		inside = append(inside, object{"name": m.name, "mountPath": m.path, "readOnly": true})
	}
	b, err := json.Marshal(object{"extraVolumes": volumes, "extraVolumeMounts": inside})
	f.must(err)
	file := filepath.Join(f.TempDir(), "values.json")
	f.must(os.WriteFile(file, b, 0o600))
	return file
}

// rollout ends every daemon in favour of a new one. Kubelet starts a container that died at once the first time only.
func (s *suite) rollout(ctx context.Context) error {
	if _, err := s.Kubectl(ctx, "rollout", "restart", "-n", clustertest.ReleaseNamespace, "daemonset/"+clustertest.Release); err != nil {
		return err
	}
	if err := s.Rollout(ctx); err != nil {
		return err
	}
	for node := 1; node <= 2; node++ { // the old one has drained
		for pid := 0; pid == 0; {
			var err error
			if pid, err = s.Node(node).Daemon(ctx); err != nil {
				return err
			}
			if pid == 0 {
				if err := pause(ctx, 100*time.Millisecond); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// daemonPod is the daemon's pod on a node.
func (s *suite) daemonPod(ctx context.Context, node int) (*corev1.Pod, error) {
	list, err := s.Kube.CoreV1().Pods(clustertest.ReleaseNamespace).List(ctx, metav1.ListOptions{
		LabelSelector: "app.kubernetes.io/name=" + clustertest.Release, FieldSelector: "spec.nodeName=" + s.Node(node).Name,
	})
	if err != nil {
		return nil, err
	}
	if len(list.Items) != 1 {
		return nil, fmt.Errorf("%d pods of the daemon on node %d", len(list.Items), node)
	}
	return &list.Items[0], nil
}

// pause is how a condition is asked for again.
func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// report is the table. A run replaces the rows of its faults and keeps the others.
type report struct {
	Machine string
	Date    string
	Long    bool
	Rows    []row

	dir string
	ran map[string]bool
}

// row is what one fault came to.
type row struct {
	Fault, How string
	Nodes      []int
	Date       string
	Sequences  int
	Answers    map[string]int
	LongestGap float64 // seconds
	Whole      float64 // seconds until everything was as before
	Since      string  // what Whole counts from
	// Failed sequences of pods for which the daemon had valid credentials, and why it could not give them; Unexplained must be 0.
	Failed      int
	Why         string
	Unexplained int
	// Credentials seen by pods.
	Node, Foreign, Expired int
	Notes                  []string
}

func newReport(long bool) (report, error) {
	r := report{Long: long, ran: map[string]bool{}}
	dir, err := filepath.Abs("../out")
	if err != nil {
		return r, err
	}
	r.dir = dir
	if b, err := os.ReadFile(filepath.Join(dir, "faults.json")); err == nil {
		var before report
		if err := json.Unmarshal(b, &before); err != nil {
			return r, fmt.Errorf("%s/faults.json: %w: remove it", dir, err)
		}
		r.Rows, r.Long = before.Rows, before.Long || long
	}
	r.Machine, r.Date = machine(), time.Now().UTC().Format(time.DateOnly)
	return r, nil
}

func machine() string {
	sh := func(command string) string {
		out, err := exec.Command("sh", "-c", command).Output()
		if err != nil {
			return "?"
		}
		return strings.TrimSpace(string(out))
	}
	return fmt.Sprintf("%s cores, %s GiB, Linux %s, %s", sh("nproc"), sh("awk '/MemTotal/{printf \"%.0f\", $2/1048576}' /proc/meminfo"),
		sh("uname -r"), sh(". /etc/os-release; echo $PRETTY_NAME"))
}

// add puts a row in its place.
func (r *report) add(add row) {
	r.ran[add.Fault] = true
	rows := map[string]row{}
	for _, old := range r.Rows {
		rows[old.Fault] = old
	}
	rows[add.Fault] = add
	r.Rows = nil
	for _, e := range catalogue {
		if found, ok := rows[e.name]; ok {
			r.Rows = append(r.Rows, found)
		}
	}
}

func (r *report) write() error {
	if len(r.ran) == 0 {
		return nil
	}
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(r.dir, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(r.dir, "faults.json"), append(b, '\n'), 0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(r.dir, "faults.md"), []byte(r.markdown()), 0o644)
}
