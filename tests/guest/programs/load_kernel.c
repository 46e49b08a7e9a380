/* Load a kernel for kexec, without kexec-tools: load_kernel [-p] KERNEL INITRD COMMAND_LINE, or -e to start it.
 *
 * -p loads it as the crash kernel. See kexec_file_load(2) and reboot(2).
 */
#include <fcntl.h>
#include <linux/kexec.h>
#include <linux/reboot.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(int count, char **words)
{
    unsigned long flags = 0;
    int kernel, initrd;

    if (count == 2 && !strcmp(words[1], "-e")) {
        sync();
        syscall(SYS_reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_KEXEC, NULL);
        perror("reboot");
        return 1;
    }
    if (count > 1 && !strcmp(words[1], "-p")) {
        flags = KEXEC_FILE_ON_CRASH;
        words++;
        count--;
    }
    if (count != 4) {
        fputs("load_kernel [-p] KERNEL INITRD COMMAND_LINE | -e\n", stderr);
        return 2;
    }
    kernel = open(words[1], O_RDONLY);
    initrd = open(words[2], O_RDONLY);
    if (kernel < 0 || initrd < 0 ||
        syscall(SYS_kexec_file_load, kernel, initrd, strlen(words[3]) + 1, words[3], flags) < 0) {
        perror("load_kernel");
        return 1;
    }
    return 0;
}
