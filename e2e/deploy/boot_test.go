package deploy_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/util/yaml"
)

// showRules prints every routing rule and who made it.
const showRules = "ip -d -4 rule; ip -d -6 rule"

// daemon is the binary of this checkout.
var daemon = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "imdsgate-deploy-")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "imdsgate")
	cmd := exec.Command("go", "build", "-o", path, "./cmd/imdsgate")
	cmd.Dir, cmd.Stderr = "../..", os.Stderr
	return path, cmd.Run()
})

// shell runs a script in a network namespace of its own, without any interface that leads out.
func shell(t *testing.T, script string) string {
	t.Helper()
	path, err := daemon()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "sh", "-c", script)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "IMDSGATE=" + path, "XTABLES_LOCKFILE=" + filepath.Join(t.TempDir(), "lock"), "AWS_EC2_METADATA_DISABLED=true", "STATE=" + t.TempDir()}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return string(out)
}

// The unit, bootcmd and -guard-only install what the daemon's guard is, whether once or twice, and -cleanup takes it away.
func TestBootRules(t *testing.T) {
	t.Cleanup(func() {
		if path, err := daemon(); err == nil {
			os.RemoveAll(filepath.Dir(path))
		}
	})
	before := shell(t, showRules)
	// A wrong flag: the guard comes before the refusal.
	guard := shell(t, `"$IMDSGATE" -port=0 2>/dev/null; `+showRules)
	if guard == before || strings.Count(guard, "unreachable") != 2 {
		t.Fatalf("the daemon's guard is not there:\n%s", guard)
	}
	for name, lines := range map[string]string{"imdsgate-guard.service": unit(t), "imdsgate-guard.cloud-config.yaml": bootcmd(t)} {
		t.Run(name, func(t *testing.T) {
			for what, script := range map[string]string{"once": lines, "twice": lines + lines} {
				if diff := cmp.Diff(guard, shell(t, script+showRules)); diff != "" {
					t.Errorf("%s: rules (-daemon's +%s's):\n%s", what, name, diff)
				}
			}
			if diff := cmp.Diff(guard, shell(t, lines+`"$IMDSGATE" -port=0 2>/dev/null; `+showRules)); diff != "" {
				t.Errorf("the daemon changes them (-before +after):\n%s", diff)
			}
			if diff := cmp.Diff(before, shell(t, lines+`"$IMDSGATE" -cleanup -state-dir="$STATE" >/dev/null || exit; `+showRules)); diff != "" {
				t.Errorf("-cleanup leaves some behind (-before +after):\n%s", diff)
			}
		})
	}
	// As the chart's first container runs it: NET_ADMIN alone, no state directory, no iptables.
	t.Run("-guard-only", func(t *testing.T) {
		const run = `setpriv --no-new-privs --inh-caps=-all%[1]s --bounding-set=-all%[1]s env PATH= IMDSGATE_STATE_DIR=/nowhere "$IMDSGATE" -guard-only`
		only := fmt.Sprintf(run, ",+net_admin") + " || exit\n"
		for what, script := range map[string]string{"once": only, "twice": only + only, "beside the unit's": unit(t) + only} {
			if diff := cmp.Diff(guard, shell(t, script+showRules)); diff != "" {
				t.Errorf("%s: rules (-daemon's +these):\n%s", what, diff)
			}
		}
		out := shell(t, fmt.Sprintf(run, "")+" 2>&1 && echo succeeded; "+showRules)
		if !strings.Contains(out, "NET_ADMIN") || strings.Contains(out, "succeeded") || !strings.HasSuffix(out, before) {
			t.Errorf("without its capability:\n%s", out)
		}
	})
}

// Without its rules the unit fails, and kubelet, which requires it, does not start.
func TestGuardUnitFailsClosed(t *testing.T) {
	lines := strings.Split(strings.TrimSpace(unit(t)), "\n")
	check := lines[len(lines)-1]
	for _, rule := range []string{"-4 rule del pref 0 to 169.254.169.254 unreachable", "-6 rule del pref 0 to fd00:ec2::254 unreachable"} {
		if out := shell(t, unit(t)+"ip "+rule+"; "+strings.TrimSuffix(check, " || exit 1")+" || echo failed"); strings.TrimSpace(out) != "failed" {
			t.Errorf("the unit succeeds after ip %s: %q", rule, out)
		}
	}
}

// unit returns the unit's commands as a script. A command with "-" may fail.
func unit(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(deployDir + "/imdsgate-guard.service")
	if err != nil {
		t.Fatal(err)
	}
	var script string
	for _, m := range regexp.MustCompile(`(?m)^ExecStart=(-?)(.*)$`).FindAllStringSubmatch(string(text), -1) {
		if m[1] == "-" {
			script += m[2] + " 2>/dev/null || :\n"
		} else {
			script += m[2] + " || exit 1\n"
		}
	}
	for _, line := range []string{"Before=kubelet.service", "RequiredBy=kubelet.service", "Type=oneshot", "RemainAfterExit=yes"} {
		if !regexp.MustCompile(`(?m)^` + line + `$`).Match(text) {
			t.Errorf("the unit lacks %s", line)
		}
	}
	return script
}

// bootcmd returns cloud-init's commands as the script that it makes of them, where each line goes on after a failed one.
func bootcmd(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(deployDir + "/imdsgate-guard.cloud-config.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var config struct{ Bootcmd []string }
	if err := yaml.Unmarshal(text, &config); err != nil {
		t.Fatal(err)
	}
	if len(config.Bootcmd) != 6 {
		t.Fatalf("bootcmd has %d lines", len(config.Bootcmd))
	}
	var script string
	for _, line := range config.Bootcmd {
		script += line + " 2>/dev/null\n"
	}
	return script
}
