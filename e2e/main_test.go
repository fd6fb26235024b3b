package e2e_test

import (
	"os"
	"testing"

	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

// shared is the lab of this package: one control plane, and a node of its own for every test.
var shared *lab.Lab

func TestMain(m *testing.M) { os.Exit(labtest.Main(m, func(l *lab.Lab) { shared = l })) }
